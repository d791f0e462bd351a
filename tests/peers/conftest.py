"""Cross-checks with other people's tools: run by `make peers`, in an environment of its own that has them."""


def pytest_configure(config):
    config.addinivalue_line("markers", "peers: compares with another tool, which `make peers` installs")


def pytest_ignore_collect(collection_path, config):
    """Without `-m peers` the other tools need not be there."""
    asked = "peers" in (config.option.markexpr or "")
    return True if collection_path.name.startswith("test_") and not asked else None
