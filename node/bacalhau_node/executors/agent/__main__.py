"""Start the agent: `python -s -u agent/__main__.py`. This file, not the folder: that would load `runpy` first.

The modules of this folder are loaded under a name of their own, and the folder is on nobody's path: a module
`values` or `text` that a cell imports is the user's.
"""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(HERE):
    del sys.path[0]
package = type(sys)("_bacalhau_agent")
package.__path__ = [HERE]
sys.modules["_bacalhau_agent"] = package

from _bacalhau_agent.supervise import main  # type: ignore[import-not-found]  # noqa: E402 - the name is made above

main()
