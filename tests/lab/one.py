import sys; sys.path.insert(0,'.')
from lablib import check; check.load()
ts=[t for t in check.TESTS if t.name in sys.argv[1:]]; check.prepare(ts)
for t in ts: print(check.run_one(t), flush=True)
