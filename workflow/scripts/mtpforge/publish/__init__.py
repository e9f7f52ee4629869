"""Publishing: model card, checksums, provenance, upload."""
