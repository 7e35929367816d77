"""What everything else stands on: requests and snapshots, time, random generators, compiling, files, paths."""
