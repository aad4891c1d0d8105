"""How fast a model runs here and what memory it takes, each figure beside the limit that was measured in the same run.

    workload   what is measured: jobs, in the order in which they run
    card       the published figures
    costs      bytes and operations that a job needs, and how long the machine would take for them
    records    what comes out: rows, the machine, the ceilings
    hardware   the machine in words
    ceilings   how fast this machine reads memory and multiplies
    measure    runs one job on a loaded model
    subject    the model that is measured, in each precision
    alone      a job in a process of its own, whose peak of memory is the job's
    peer       transformers on the same weights
    session    all jobs, one after the other; what is finished is kept
    report     Markdown
    plot       PNG

Only what runs the model imports torch.
"""
