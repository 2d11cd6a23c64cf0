"""``quietstar inspect``: a page that shows what a model thinks."""
