"""What is published: model card, checksums, provenance, upload."""
