"""Models as Hugging Face folders: the only place that knows transformers."""
