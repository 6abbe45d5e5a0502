"""A `python` that starts in no time: it is forked from a server that has loaded the libraries,
which takes seconds.

python warm_python.py SOCKET                 the server, which ends with its standard input
python -IS warm_python.py SOCKET SCRIPT ...  does what `python SCRIPT ...` does: same files, folder,
environment, code

What a library reads from the environment while it is imported, such as OMP_NUM_THREADS, is the
server's.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading

LIBRARIES = (
    "h5py",
    "pandas",
    "pylibmagic",
    "faiss",
    "timm",
    "torch.distributed.run",
    "augly.image",
    "cv2",
)
LIBRARIES += ("simplejpeg", "torchvision.transforms.v2", "imagehash", "matplotlib.pyplot")


def serve(address):
    """Fork for each command, and return its arguments in the process that is to run it; None at the
    end.
    """
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()  # the collector shall not touch, and so copy, what the forks share
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel takes away who has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while server in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            with connection:
                if os.fork() == 0:
                    return take(connection)


def take(connection):
    """Fork once more: one process waits and tells the exit code, in the other this returns the
    command's arguments.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    if command := os.fork():
        _, status = os.waitpid(command, 0)
        connection.send(str(os.waitstatus_to_exitcode(status)).encode())
        os._exit(0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    argv, folder, environment = json.loads(request)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    return argv


def ask(address, argv):
    """Have the server run a command on this process's files; returns the exit code."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = json.dumps([argv, os.getcwd(), dict(os.environ)])  # noqa: PTH109  pathlib is slow to import
        socket.send_fds(connection, [request.encode()], [0, 1, 2])
        return int(connection.recv(16))


def execute(argv):
    """Do what `python SCRIPT ...` does, but for taking down all that is loaded, which costs seconds
    in a fork.
    """
    sys.argv, sys.path[0] = argv, os.path.realpath(os.path.dirname(argv[0]))  # noqa: PTH120
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if not isinstance(code, int):  # sys.exit("message")
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # waits for the threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    address, *argv = sys.argv[1:]
    if argv:
        code = ask(address, argv)
        if code < 0:
            os.kill(os.getpid(), -code)
        sys.exit(code)
    if argv := serve(address):
        execute(argv)
    os._exit(0)
