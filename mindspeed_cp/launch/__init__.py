"""Command lines before they run: what a launch script would start, and what becomes of its flags."""
