"""How learners talk: worlds of ranks, messages and collectives on a communication thread, over MPI.

MPI itself is imported by `mpi` alone; the rest runs over threads of one process too (`kaldi_mpi.testing.threads`).
"""
