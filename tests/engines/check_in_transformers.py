"""Compare exports with their runs in whatever transformers this process finds; run by test_transformers4.py.

    python check_in_transformers.py RUN EXPORT [RUN EXPORT ...]

Prints, as JSON, the version of transformers and by the folder of the export every check of its own export, made again.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from tiny_lm.export.agreement import Reference
from tiny_lm.export.source import load_source
from tiny_lm.export.transformers_engine import TransformersEngine, import_transformers
from tiny_lm.export.verify import OwnEngine, check_greedy, check_tokens

checks = {}
for run, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    source = load_source(run)
    own, engine = OwnEngine(source), TransformersEngine(Path(folder))
    found = check_tokens(source, own, engine)
    reference = Reference(source)
    found += [*reference.check(engine), check_greedy(source, own, engine, reference.difference_limit)]
    checks[folder] = [asdict(check) for check in found]
print(json.dumps({"version": import_transformers().__version__, "checks": checks}))
