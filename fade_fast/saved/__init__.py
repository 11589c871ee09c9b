"""Files that restore a cache, snapshots of its contents, and its events."""
