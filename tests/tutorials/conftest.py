"""The scripts beside a tutorial are no package: a test file names their FOLDER and the SCRIPTS in it that it imports."""

import sys

import pytest


@pytest.fixture(scope="module")
def scripts(request):
    """The tutorial's modules by name."""
    folder, names = str(request.module.FOLDER), request.module.SCRIPTS
    sys.path.insert(0, folder)
    try:
        yield {name: __import__(name) for name in names}
    finally:
        sys.path.remove(folder)
        for name in names:
            sys.modules.pop(name, None)
