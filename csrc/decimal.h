/* Decimal numbers in text, whatever the process's locale says about decimal points. */
#ifndef KALDI_MPI_DECIMAL_H
#define KALDI_MPI_DECIMAL_H

#include "error.h"

#include <stdint.h>

/* Reads the number at data[*at] (before `end`) and moves *at behind it. With `in_float` it is rounded to
 * float once, as Kaldi does, and not by way of a double. A number that is not finite is an error. */
int km_text_number(const unsigned char *data, int64_t end, int64_t *at, int in_float, double *value,
                   km_error *error);

#endif
