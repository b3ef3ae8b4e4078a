"""torchrun with a report: ``python -m mipipe.runtime.train.agent REPORT <torchrun's arguments>``.

The same as ``python -m torch.distributed.run``, but when workers fail it leaves who did and how in ``REPORT``, for the
supervisor of ``mipipe train --elastic``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

REPORT = "failures.json"


def main(arguments: list[str]) -> None:
    """Run torchrun; raise what it raises."""
    report, *rest = arguments
    try:
        run.main(rest)
    except ChildFailedError as error:
        failures = {rank: failure.exitcode for rank, failure in error.failures.items()}
        (Path(report) / REPORT).write_text(json.dumps(failures))
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
