"""Scale: the cost of a request under power of two choices, by the number of instances, and 1,000 × 200,000."""

from __future__ import annotations

import resource
import time

from testbed import simulate, warm_up

warm_up()
print("po2, 2.5 requests/s an instance")
first = None
for instances in (12, 100, 1000):
    requests = 40 * instances if instances > 250 else 10_000
    sizes = (f"cluster.num_gpus={instances}", f"workload.num_requests={requests}", f"workload.qps={2.5 * instances}")
    micros = min(simulate("scheduler=po2", *sizes).wall_time_s for _ in range(2)) / requests * 1e6
    first = first or micros
    print(f"  {instances:5} instances  {micros:5.0f} µs a request   {micros / first:4.2f} × 12 instances")
began = time.perf_counter()
simulate("scheduler=po2", "cluster.num_gpus=1000", "workload.num_requests=200000", "workload.qps=2500")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(f"  1,000 instances × 200,000 requests: {time.perf_counter() - began:.0f} s, {peak:.2f} GiB at most")
