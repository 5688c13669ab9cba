"""Where results go beyond the store of their requester, all behind `ports.Publisher`."""
