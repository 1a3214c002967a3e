"""gRPC forms of what the parts say to each other."""
