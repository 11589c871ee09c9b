"""What can be told of a cache: files that restore it, its contents as text, its events."""
