"""One module a contender: `python -m bench.contenders.NAME JOB.json` takes a job's steps and records each."""
