"""Parts of architectures."""
