"""The page that plays inside the dream, beside the real environment: see docs/play.md."""
