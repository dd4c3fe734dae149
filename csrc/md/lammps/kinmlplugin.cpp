/* ----------------------------------------------------------------------
   Makes pair_style kinml known to LAMMPS: `plugin load kinmlplugin.so`, or LAMMPS_PLUGIN_PATH.
   Distributed under the GNU General Public License, version 2, as LAMMPS; see pair_kinml.h.
------------------------------------------------------------------------- */
#include <lammps.h>
#include "pair_kinml.h"

namespace {

// As in lammpsplugin.h, which an installed LAMMPS does not bring.
extern "C" {
using Creator = void*(void*);
struct Plugin {
  const char *version, *style, *name, *info, *author;
  union {
    Creator* of_style;
    void* (*of_command)(void*, int, char**);
  } creator;
  void* handle;
};
using Register = void (*)(Plugin*, void*);

void* create_pair(void* lammps) {
  return new LAMMPS_NS::PairKinML(static_cast<LAMMPS_NS::LAMMPS*>(lammps));
}
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void lammpsplugin_init(void* lammps, void* handle,
                                                                         void* registered) {
  Plugin plugin{};
  plugin.version = static_cast<LAMMPS_NS::LAMMPS*>(lammps)->version;
  plugin.style = "pair";
  plugin.name = "kinml";
  plugin.info = "ANI-type neural network potentials of kinml_fast";
  plugin.author = "the kinml_fast developers";
  plugin.creator.of_style = &create_pair;
  plugin.handle = handle;
  reinterpret_cast<Register>(registered)(&plugin, lammps);
}
