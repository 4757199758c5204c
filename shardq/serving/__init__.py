"""What servers make of a checkpoint: judged from config.json and headers alone, before anybody starts one.

served.py      config + headers -> Served: what lies there, and what the configuration says of it
believed.py    what a configuration says of a module, by quantization method
table/         one row for each thing that is known of an engine, with version and source; facts.py loads it
conditions.py  the tests that rows name; parallel.py those of tensor parallelism
judge.py       Served -> a verdict for each engine
targets.py     --target: a verdict "no" as a refusal
"""
