"""The families of architectures that mtpforge converts itself, one module each."""
