"""The pages a browser gets from a router: the playground, which chats with pictures and video, and the console, which
shows what the cluster does.

Each has a folder of HTML, CSS and JavaScript modules as the browser loads them, without a build step and without
anything from elsewhere; ``shared`` holds what both use. They call the HTTP API of the router they came from, and
nothing else.
"""
