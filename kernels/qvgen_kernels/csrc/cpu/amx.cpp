#include "qv.h"
namespace qv { BackendInfo amx_backend() { return portable_backend(); } }
