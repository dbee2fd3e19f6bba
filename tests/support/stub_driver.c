// A CUDA driver without a GPU: loads what Triton compiled, and writes a line for each launch to STUB_LOG, with the
// kernel's parameters as it would read them. Their places are in the cubin (EIATTR_KPARAM_INFO).
#include <cuda.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK return CUDA_SUCCESS
#define DRIVER __attribute__((visibility("default"))) CUresult

typedef struct {
  int count;
  unsigned size[512];
} Module;

typedef struct {
  const Module* module;
  char name[128];
} Function;

DRIVER cuInit(unsigned flags) { OK; }
DRIVER cuDriverGetVersion(int* version) { *version = 13000; OK; }
DRIVER cuDeviceGetCount(int* count) { *count = 1; OK; }
DRIVER cuDeviceGet(CUdevice* device, int i) { *device = 0; OK; }
DRIVER cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice device) {
  switch (which) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
    default: *value = 232448;  // shared memory of a block
  }
  OK;
}
DRIVER cuCtxGetCurrent(CUcontext* context) { *context = (CUcontext)1; OK; }
DRIVER cuCtxSetCurrent(CUcontext context) { OK; }
DRIVER cuCtxGetDevice(CUdevice* device) { *device = 0; OK; }
DRIVER cuCtxGetLimit(size_t* value, CUlimit limit) { *value = 0; OK; }
DRIVER cuCtxSetLimit(CUlimit limit, size_t value) { OK; }
DRIVER cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) { *context = (CUcontext)1; OK; }
DRIVER cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) { *status = 0; OK; }
DRIVER cuGetErrorString(CUresult error, const char** text) { *text = "no error of a stub"; OK; }
DRIVER cuPointerGetAttribute(void* data, CUpointer_attribute which, CUdeviceptr pointer) {
  *(CUdeviceptr*)data = pointer;
  OK;
}
DRIVER cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction function) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  OK;
}
DRIVER cuFuncSetAttribute(CUfunction function, CUfunction_attribute which, int value) { OK; }
DRIVER cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { OK; }

DRIVER cuModuleLoadData(CUmodule* module, const void* image) {
  const unsigned char* elf = image;
  size_t headers = *(const size_t*)(elf + 0x28), end = headers + 64ul * *(const unsigned short*)(elf + 0x3c);
  Module* found = calloc(1, sizeof(Module));
  for (size_t i = 0; i + 16 <= end; i += 4) {
    if (memcmp(elf + i, "\x04\x17\x0c\x00", 4)) continue;
    unsigned ordinal = *(const unsigned short*)(elf + i + 8), word = *(const unsigned*)(elf + i + 12);
    if (ordinal >= 512) return CUDA_ERROR_INVALID_IMAGE;
    found->size[ordinal] = word >> 18;
    if (found->count <= (int)ordinal) found->count = ordinal + 1;
  }
  *module = (CUmodule)found;
  OK;
}
DRIVER cuModuleUnload(CUmodule module) { OK; }
DRIVER cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  Function* found = calloc(1, sizeof(Function));
  found->module = (const Module*)module;
  strncpy(found->name, name, sizeof(found->name) - 1);
  *function = (CUfunction)found;
  OK;
}

DRIVER cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction given, void** params, void** extra) {
  const Function* function = (const Function*)given;
  FILE* log = fopen(getenv("STUB_LOG"), "a");
  if (!log) return CUDA_ERROR_UNKNOWN;
  fprintf(log, "{\"name\": \"%s\", \"grid\": [%u, %u, %u], \"threads\": %u, \"shared\": %u, \"attributes\": {", function->name,
          config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->sharedMemBytes);
  for (unsigned i = 0; i < config->numAttrs; i++)
    fprintf(log, "%s\"%d\": %d", i ? ", " : "", config->attrs[i].id, *(const int*)&config->attrs[i].value);
  fprintf(log, "}, \"params\": [");
  for (int i = 0; i < function->module->count; i++) {
    unsigned long long value = 0;
    memcpy(&value, params[i], function->module->size[i]);
    fprintf(log, "%s[%u, %llu]", i ? ", " : "", function->module->size[i], value);
  }
  fprintf(log, "]}\n");
  fclose(log);
  OK;
}
