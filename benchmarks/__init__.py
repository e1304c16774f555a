"""Programs that measure; each prints what docs/ shows, and says how it measures."""
