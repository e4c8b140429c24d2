"""Inference of language models whose sequences are spread over ranks."""
