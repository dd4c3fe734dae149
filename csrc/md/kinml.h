/* kinml_fast for MD codes, in C: positions in, energies, forces and virials out. No torch, no Python.
 *
 *   kinml_potential* p = kinml_open("model.kinml", KINML_AS_TRAINED);
 *   if (p == NULL) fprintf(stderr, "%s\n", kinml_error());
 *   kinml_compute(p, &atoms, &results, n_threads);
 *
 * Lengths are in angstrom, energies in eV. Arrays are the caller's. `kinml-fast export --format plain`
 * writes the model; link with libkinml_md. */
#ifndef KINML_H
#define KINML_H

#include <stdint.h>

#if defined(__GNUC__)
#define KINML_EXPORT __attribute__((visibility("default")))
#else
#define KINML_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kinml_potential kinml_potential;

/* The arithmetic; energies are summed in double in any case. */
enum kinml_precision { KINML_AS_TRAINED = 0, KINML_SINGLE = 32, KINML_DOUBLE = 64 };

/* One structure. */
typedef struct kinml_atoms {
  int64_t n;
  /* The first so many atoms have energies; the others are their neighbours only, as ghosts of another
   * process, or images that the caller has made. */
  int64_t n_centres;
  const double* positions; /* [n, 3] */
  const int64_t* species;  /* [n] places in the model's list of elements */
  /* NULL: it is a molecule. */
  const double* cell;      /* [3, 3] rows are lattice vectors */
  const int64_t* periodic; /* [3] along which of them: not 0 */
  /* A full list of neighbours that the caller has, with those beyond the cutoff if it likes; NULL:
   * they are looked for. */
  const int64_t* pair_starts; /* [n + 1] where those of an atom begin */
  const int64_t* neighbours;  /* [n_pairs] atoms */
} kinml_atoms;

/* Of each of the M members of an ensemble, or of one model. */
typedef struct kinml_results {
  double* energies; /* [M] */
  double* forces;   /* [M, n, 3] eV/angstrom, of ghosts as well */
  /* Those that are wanted; NULL: not. Those of ghosts are 0. */
  double* atomic_energies; /* [M, n] */
  /* [M, n, 3, 3] of the pairs of a centre, the sum of dE/d(displacement) (x) displacement, row by
   * derivative. The sum over atoms is the derivative of the energy by a strain. */
  double* virials;
  /* [n] extrapolation grades: above 1 the environment of an atom is beyond those of the training data
   * (kinml_fast/deploy/grade.py has the formula). For models that have them. */
  double* grades;
  /* [M, 3 n, 3 n] second derivatives of the energies by the positions, eV/angstrom^2. */
  double* hessians;
} kinml_results;

/* NULL: kinml_error() says why. */
KINML_EXPORT kinml_potential* kinml_open(const char* path, enum kinml_precision precision);
KINML_EXPORT void kinml_close(kinml_potential* potential);

KINML_EXPORT int64_t kinml_n_members(const kinml_potential* potential); /* M */
KINML_EXPORT int64_t kinml_n_elements(const kinml_potential* potential);
KINML_EXPORT const char* kinml_element(const kinml_potential* potential, int64_t species);
/* Place of an element in that list, -1: the model does not know it. */
KINML_EXPORT int64_t kinml_species(const kinml_potential* potential, const char* element);
/* Beyond which atoms do not feel one another. */
KINML_EXPORT double kinml_cutoff(const kinml_potential* potential);
KINML_EXPORT enum kinml_precision kinml_precision_of(const kinml_potential* potential);
/* Whether energies are differences from another level of theory (delta learning), not 0. */
KINML_EXPORT int kinml_is_difference(const kinml_potential* potential);

/* What standard deviations (the divisor is M - 1) of the members' energies, and of their forces on atoms of
 * a species, are multiplied with, so that 68 % of the errors are smaller: 1 unless the ensemble was
 * calibrated when it was trained. */
KINML_EXPORT double kinml_energy_factor(const kinml_potential* potential);
KINML_EXPORT double kinml_forces_factor(const kinml_potential* potential, int64_t species);

/* Whether the file has what grades take: it was exported with --training-data. */
KINML_EXPORT int kinml_has_grades(const kinml_potential* potential);

/* 0, or not: then kinml_error() says why, such as positions that are no numbers. The same bits for any
 * number of threads. One call at a time for a potential. */
KINML_EXPORT int kinml_compute(kinml_potential* potential, const kinml_atoms* atoms,
                               const kinml_results* results, int n_threads);

/* One sentence about the last call of this thread that failed. */
KINML_EXPORT const char* kinml_error(void);

#ifdef __cplusplus
}
#endif

#endif
