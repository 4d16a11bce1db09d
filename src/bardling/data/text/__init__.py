"""Where documents come from: files and folders, named datasets, the Hugging Face hub, and downloads."""
