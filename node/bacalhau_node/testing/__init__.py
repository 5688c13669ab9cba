"""Public test helpers: simulator, fakes, contract suites, builders."""
