"""How bytes travel between nodes, all behind `ports.Transport`."""
