/* The index of one archive of examples, made by one sequential pass over it in large blocks. */
#ifndef KALDI_MPI_EGS_SCAN_H
#define KALDI_MPI_EGS_SCAN_H

#include "egs_index.h"
#include "examples.h"

/* python: begin */
/* Goes on with the index of an archive to its end; `output` is the output's name. Memory: a block of 4 MiB,
 * or one example if that is larger (at most 1 GiB), and the units. After a failure the index is that of the
 * examples before the one at fault, which index->entry says. */
int km_egs_scan(const km_file *file, const char *output, km_egs_index *index, km_error *error);

/* Leaves the example at index->entry out: moves on to the next place where an example begins, to all
 * appearances, or to the end of the file. */
int km_egs_skip(const km_file *file, km_egs_index *index, km_error *error);
/* python: end */

#endif
