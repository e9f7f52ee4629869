"""The Hugging Face Hub: listings and downloads."""
