"""Run scripts in forks of one process that has imported MindSpore, as an import takes seconds.

Standard input has one JSON line per script: argv, folder, environment, and the files for stdout and stderr.
Its exit code is printed.
"""

import json
import os
import runpy
import sys

import CLAN_evaluate_city  # noqa: F401
import CLAN_train_gta5_2_city  # noqa: F401

for line in sys.stdin:
    argv, folder, environment, *output = json.loads(line)
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        for stream, path in enumerate((os.devnull, *output)):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), stream)
        sys.argv = argv
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
