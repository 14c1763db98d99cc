// What a build of PyTorch for CPUs does not know of a GPU; compiled by pretended_gpu.py.
// A guard is asked which GPU is the current one, at every index and copy. Hooks are asked whether there is a GPU at all.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/detail/MPSHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <new>

namespace {

c10::DeviceIndex gpus = 1;

template <c10::DeviceType kind>
struct CurrentGpu final : c10::impl::NoOpDeviceGuardImpl<kind> {
  static inline thread_local c10::DeviceIndex current = 0;
  c10::Device getDevice() const override { return {kind, current}; }
  c10::Device exchangeDevice(c10::Device next) const override {
    const c10::Device before = getDevice();
    setDevice(next);
    return before;
  }
  void setDevice(c10::Device next) const override { current = next.index(); }
  void uncheckedSetDevice(c10::Device next) const noexcept override { current = next.index(); }
  c10::DeviceIndex deviceCount() const noexcept override { return gpus; }
};

template <class Interface>
struct Present : Interface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return gpus; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  bool isPinnedPtr(const void*) const override { return false; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return at::detail::getDefaultCPUGenerator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

struct Nvidia final : Present<at::CUDAHooksInterface> {
  bool hasCUDA() const override { return true; }
  int getNumGPUs() const override { return gpus; }
};

struct Apple final : Present<at::MPSHooksInterface> {
  bool hasMPS() const override { return true; }
};

const c10::impl::DeviceGuardImplRegistrar nvidia(c10::DeviceType::CUDA, new CurrentGpu<c10::DeviceType::CUDA>());
const c10::impl::DeviceGuardImplRegistrar apple(c10::DeviceType::MPS, new CurrentGpu<c10::DeviceType::MPS>());

}  // namespace

// PyTorch has made its hooks, which say no, while it was imported, and keeps them: they are made again in their place.
extern "C" void have_gpus(bool apples, int count) {
  gpus = static_cast<c10::DeviceIndex>(count);
  if (apples)
    new (const_cast<at::MPSHooksInterface*>(&at::detail::getMPSHooks())) Apple();
  else
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Nvidia();
}
