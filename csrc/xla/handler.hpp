// The handlers of a training step, and what the one for the host and the one for a GPU share.
#pragma once

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "xla/call.hpp"
#include "xla/ffi.hpp"

namespace adamax::xla {

Error* step_on_host(CallFrame* frame);
Error* step_on_cuda(CallFrame* frame);
// For a GPU, where this build has no kernels for it.
Error* refuse(CallFrame* frame);

inline Error* make_error(const CallFrame& frame, ErrorCode code, const std::string& message) {
  ErrorCreateArgs args{sizeof(ErrorCreateArgs), nullptr, message.c_str(), code};
  return frame.api->error_create(&args);
}

// Answers what the handler is, if that is asked; does nothing before execution, and else calls
// `step`, whose exceptions become errors.
template <class Step>
Error* handle(CallFrame& frame, const Step& step) {
  for (const Extension* extension = frame.extensions; extension; extension = extension->next) {
    if (extension->type != ExtensionType::kMetadata) continue;
    Version& version = reinterpret_cast<const MetadataExtension*>(extension)->metadata->version;
    version.major_version = kMajorVersion;
    version.minor_version = kMinorVersion;
    return nullptr;
  }
  if (frame.stage != Stage::kExecute) return nullptr;
  try {
    step(frame);
    return nullptr;
  } catch (const std::invalid_argument& error) {
    return make_error(frame, ErrorCode::kInvalidArgument, error.what());
  } catch (const std::bad_alloc& error) {
    return make_error(frame, ErrorCode::kResourceExhausted, error.what());
  } catch (const std::exception& error) {
    return make_error(frame, ErrorCode::kInternal, error.what());
  }
}

}  // namespace adamax::xla
