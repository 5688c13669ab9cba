"""Where inputs come from, all behind `ports.Source`."""
