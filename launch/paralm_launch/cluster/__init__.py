"""Jobs on a cluster: what ``paralm submit``, ``status``, ``logs`` and ``cancel`` are made of.

plan.py: which jobs a configuration asks for, and their scripts. render.py: from a template of ``slurm/`` to a script.
records.py: what the run folder keeps of its jobs. slurm.py and ray_jobs.py: the two kinds of cluster. submit.py hands
the jobs over, watch.py looks after them.
"""
