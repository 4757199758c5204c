"""Many sources, each into many outputs, by a manifest: what a scheduled job runs again and again."""
