"""From chat messages to token ids and patches, and from token ids back to text."""
