"""Evaluations: benchmarks, run through the engine that users get, so that their figures can be trusted and repeated.

task        what a task is: samples, questions, answers, scores
tasks/      the tasks, one module per benchmark
data        the folder of data sets, checked by count and hash
runner      likelihood and generation: samples in, answers out
records     one line per sample; resumed after a kill
run         tasks x precisions -> a folder of results
statistics  standard errors, paired tests
figures     what a summary is made of
identity    which model it was
sandbox     what a model wrote, run in a box; seccomp: the system calls it is refused there
programs    programs in replies: found, run with tests; attempts: the tasks that do so, pass@k
rouge       Rouge-L over tokens
"""
