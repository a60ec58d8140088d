"""From a mapping file and two configs to a checked plan; no weights are read."""
