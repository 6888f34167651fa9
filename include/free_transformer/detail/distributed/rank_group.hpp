/// The processes that compute one loss together: what the losses ask of c10d, and no more.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/Types.hpp>

#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "free_transformer/detail/compilation.hpp"

namespace free_transformer::FREE_TRANSFORMER_DETAIL {

/// Any group that a pointer leads to (intrusive, shared or plain): c10d's ProcessGroup, its Backend since LibTorch 2.0,
/// or a stand-in. They have getRank(), getSize(), allreduce and allgather in common, in every LibTorch.
class RankGroup {
 public:
  template <typename GroupPointer>
  RankGroup(const char* function, GroupPointer group) {
    TORCH_CHECK(group, function, ": group must lead to a process group, got a null pointer");
    collectives_ = std::make_shared<CollectivesOf<GroupPointer>>(std::move(group));
  }

  int64_t rank() const { return collectives_->rank(); }
  int64_t size() const { return collectives_->size(); }

  /// Replaces a contiguous tensor by its sum or maximum over all ranks. Like `gather`, it sends nothing where the
  /// tensors, which have one shape on all ranks, are empty: Gloo divides by their size.
  void sum(const char* function, const at::Tensor& values) const { reduce(function, values, c10d::ReduceOp::SUM); }
  void maximum(const char* function, const at::Tensor& values) const { reduce(function, values, c10d::ReduceOp::MAX); }

  /// The contiguous tensors of all ranks, which have one shape, as [ranks, ...].
  at::Tensor gather(const char* function, const at::Tensor& values) const {
    auto shape = values.sizes().vec();
    shape.insert(shape.begin(), size());
    at::Tensor all = at::empty(shape, values.options());
    if (values.numel() > 0) with_ranks_named(function, [&] { collectives_->gather(values, all.unbind(0)); });
    return all;
  }

 private:
  struct Collectives {
    virtual ~Collectives() = default;
    virtual int64_t rank() = 0;
    virtual int64_t size() = 0;
    virtual void reduce(const at::Tensor& values, const c10d::AllreduceOptions& options) = 0;
    virtual void gather(const at::Tensor& values, std::vector<at::Tensor> of_ranks) = 0;
  };

  template <typename GroupPointer>
  struct CollectivesOf final : Collectives {
    explicit CollectivesOf(GroupPointer pointer) : group(std::move(pointer)) {}
    int64_t rank() override { return group->getRank(); }
    int64_t size() override { return group->getSize(); }
    void reduce(const at::Tensor& values, const c10d::AllreduceOptions& options) override {
      std::vector<at::Tensor> tensors{values};
      group->allreduce(tensors, options)->wait();
    }
    void gather(const at::Tensor& values, std::vector<at::Tensor> of_ranks) override {
      std::vector<std::vector<at::Tensor>> outputs{std::move(of_ranks)};
      std::vector<at::Tensor> inputs{values};
      group->allgather(outputs, inputs)->wait();
    }
    GroupPointer group;
  };

  void reduce(const char* function, const at::Tensor& values, c10d::ReduceOp::RedOpType operation) const {
    if (values.numel() == 0) return;
    const at::NoGradGuard no_grad;
    c10d::AllreduceOptions options;
    options.reduceOp = operation;
    with_ranks_named(function, [&] { collectives_->reduce(values, options); });
  }

  /// c10d's own text says which connection or time-out it was.
  template <typename Collective>
  void with_ranks_named(const char* function, const Collective& collective) const {
    std::string reason;
    try {
      return collective();
    } catch (const c10::Error& error) {
      reason = error.what_without_backtrace();
    } catch (const std::exception& error) {
      reason = error.what();
    }
    TORCH_CHECK(false, function, ": all ranks of the group must take part within its time-out, but rank ", rank(),
                " of ", size(), " got from c10d: ", reason);
  }

  std::shared_ptr<Collectives> collectives_;
};

}  // namespace free_transformer::FREE_TRANSFORMER_DETAIL
