"""What everything else stands on: requests and snapshots, time, random streams, compiling, paths."""
