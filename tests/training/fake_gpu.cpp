// A GPU as far as PyTorch's CPU library asks for one: which device is current, which streams it
// has, and which memory is pinned. It computes nothing; see fake_gpu.py.
#include <mutex>
#include <set>

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

std::mutex pinned_mutex;
std::set<const void*> pinned;

void unpin(void* data) {
  {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.erase(data);
  }
  c10::GetCPUAllocator()->raw_deallocate(data);
}

// Plain memory that remembers that it was asked for as pinned memory.
struct PinnedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes);
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned.insert(data);
    return {data, data, &unpin, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override {
    return &unpin;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

} // namespace

namespace at {

struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasCUDA() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  int getNumGPUs() const override {
    return 1;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
  void setCurrentDevice(DeviceIndex) const override {}
  DeviceIndex exchangeDevice(DeviceIndex) const override {
    return 0;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override {
    return 0;
  }
  bool isPinnedPtr(const void* data) const override {
    std::lock_guard<std::mutex> lock(pinned_mutex);
    return pinned.count(data) > 0;
  }
  Allocator* getPinnedMemoryAllocator() const override {
    static PinnedAllocator allocator;
    return &allocator;
  }
};
REGISTER_CUDA_HOOKS(CUDAHooks)

} // namespace at

namespace c10::impl {

// The autograd engine runs backward in a thread for each device, and asks for its streams.
struct CUDAGuard final : DeviceGuardImplInterface {
  CUDAGuard() = default;
  DeviceType type() const override {
    return DeviceType::CUDA;
  }
  Device exchangeDevice(Device) const override {
    return getDevice();
  }
  Device getDevice() const override {
    return Device(DeviceType::CUDA, 0);
  }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override {
    return Stream(Stream::DEFAULT, getDevice());
  }
  Stream getDefaultStream(Device) const override {
    return Stream(Stream::DEFAULT, getDevice());
  }
  Stream exchangeStream(Stream) const override {
    return Stream(Stream::DEFAULT, getDevice());
  }
  DeviceIndex deviceCount() const noexcept override {
    return 1;
  }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, CUDAGuard)

} // namespace c10::impl
