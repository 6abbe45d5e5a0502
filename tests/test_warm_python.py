"""conftest's forked Python does what python does: output, arguments, folder, environment, exit
codes.
"""

import subprocess
import sys

import pytest

from conftest import run, warm_python

PIPES = {"capture_output": True, "text": True, "timeout": 60}
PROGRAMS = {
    "output": "import os, sys\nprint(sys.argv[1:], os.getcwd(), os.environ['COLOR'], "
    "sys.path[0], __name__)",
    "input": "import sys\nprint(sys.stdin.read().upper(), file=sys.stderr)",
    "at exit": "import atexit, threading\natexit.register(print, 'end')\nthreading.Timer(0.1, "
    "print, ['late']).start()",
    "code": "import sys\nsys.exit(75)",
    "message": "import sys\nsys.exit('no such thing')",
    "error": "print('begun')\nraise ValueError('wrong')",
    "signal": "import os\nos.kill(os.getpid(), 9)",
    "import": "import beside\nprint(beside.VALUE)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_does_what_python_does(tmp_path, name):
    script = tmp_path / "script.py"
    script.write_text(PROGRAMS[name])
    (tmp_path / "beside.py").write_text("VALUE = 7")
    warm, cold = (
        subprocess.run(
            [*python, script, "a b", "--flag"],
            cwd=tmp_path,
            env={"COLOR": "red"},
            input="words",
            **PIPES,
        )
        for python in (warm_python(), [sys.executable])
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert (
        warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]
    )  # a traceback has other frames above


def test_leaves_nothing_to_the_next_command(tmp_path):
    (tmp_path / "set.py").write_text("import os, numpy\nos.environ['COLOR'] = 'red'\nnumpy.pi = 3")
    (tmp_path / "get.py").write_text("import os, numpy\nprint(os.environ.get('COLOR'), numpy.pi)")
    assert run(tmp_path / "set.py").returncode == 0
    assert run(tmp_path / "get.py").stdout == "None 3.141592653589793\n"
