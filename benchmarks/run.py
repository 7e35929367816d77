"""A 10,000-request run on 12 instances: seconds, and what of them each scheduler's knowledge costs."""

from __future__ import annotations

from testbed import simulate, warm_up

warm_up()
base = min(simulate("scheduler=random").wall_time_s for _ in range(3))
print(f"10,000 requests, 30 requests/s, 12 instances\n  random         {base:5.2f} s")
for scheduler in ("llumnix_minus", "po2", "block"):
    seconds = min(simulate(f"scheduler={scheduler}").wall_time_s for _ in range(3))
    print(f"  {scheduler:13}  {seconds:5.2f} s   {seconds / base:4.1f} × random")
