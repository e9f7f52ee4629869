"""Object storage with the interface of S3."""
