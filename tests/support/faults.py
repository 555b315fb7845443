"""The faults that the suite must notice, each with the test that does: for tests/mutants.py."""

from typing import NamedTuple

from support.building import REPOSITORY


class Mutant(NamedTuple):
    name: str
    path: str
    text: str  # is there once
    replacement: str
    test: str  # that must notice it

    @property
    def place(self):
        """Return file and line."""
        before = (REPOSITORY / self.path).read_text().partition(self.text)[0]
        return f"{self.path}:{before.count(chr(10)) + 1}"


MUTANTS = [
    # ---- The formula -----------------------------------------------------------------------------
    Mutant(
        "operands of max: a NaN in the first is lost",
        "csrc/core/vec_scalar.hpp",
        "a.v > b.v || a.v != a.v ? a.v : b.v",
        "a.v > b.v ? a.v : b.v",
        "tests/test_kernel_bits.py::test_all_combinations_of_special_values",
    ),
    Mutant(
        "the blend that brings NaN back is dropped",
        "csrc/cpu/kernels_avx2.cpp",
        "_mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q))",
        "_mm256_max_ps(a, b)",
        "tests/test_kernel_bits.py::test_all_combinations_of_special_values",
    ),
    Mutant(
        "a tail is one element short",
        "csrc/cpu/kernels.inl",
        "body(Partial{static_cast<int>(end - i)}, i)",
        "body(Partial{static_cast<int>(end - i - 1)}, i)",
        "tests/test_kernel_bits.py::test_every_rule_and_pair",
    ),
    Mutant(
        "weights decay after the update",
        "csrc/core/update_rule.hpp",
        "  w = decayed(w, decay, s);\n  update_limited(w, h, m, u, epsilon, s);\n",
        "  update_limited(w, h, m, u, epsilon, s);\n  w = decayed(w, decay, s);\n",
        "tests/test_kernel_bits.py::test_every_rule_and_pair",
    ),
    Mutant(
        "the average is that of the weights before the update",
        "csrc/cpu/kernels.inl",
        "update_average(average, w, mode, s);",
        "update_average(average, access.template load<V>(param + i), mode, s);",
        "tests/test_kernel_bits.py::test_every_rule_and_pair",
    ),
    Mutant(
        "epsilon on the other side of the maximum",
        "csrc/core/scalars.cpp",
        "s.epsilon_rule = g.epsilon_rule;",
        "s.epsilon_rule = g.epsilon_rule == EpsilonRule::kInside ? EpsilonRule::kOutside\n"
        "                                                         : EpsilonRule::kInside;",
        "tests/test_kernel_bits.py::test_every_rule_and_pair",
    ),
    Mutant(
        "the low half of the power is left out of the bias correction",
        "csrc/core/bias_correction.hpp",
        "return whole + (((1.0 - whole) - power.high) - power.low);",
        "return whole;",
        "tests/test_bias_correction.py",
    ),
    Mutant(
        "accumulated gradients are divided by another count",
        "csrc/core/scalars.cpp",
        "1.0 / static_cast<double>(call.micro_batches)",
        "1.0 / static_cast<double>(call.micro_batches + 1)",
        "tests/test_optimizer_bits.py::test_micro_batches_equal_one_batch_as_large",
    ),
    Mutant(
        "sums of blocks are added in another order",
        "csrc/cpu/sums.cpp",
        "lanes[(e - begin) % kLanes] += sums[e]",
        "lanes[(e - begin) / (kBlock / kLanes)] += sums[e]",
        "tests/test_kernel_bits.py::test_norms_of_more_blocks_than_fit_in_one",
    ),
    # ---- Fewer bits ------------------------------------------------------------------------------
    Mutant(
        "random rounding goes the other way",
        "csrc/core/bfloat16.hpp",
        "half_unless_nan(x, x.bits() + drawn)",
        "half_unless_nan(x, x.bits() - drawn)",
        "tests/test_random_numbers.py::test_stores_round_up_with_the_probability_of_their_part",
    ),
    Mutant(
        "random numbers do not depend on the variable",
        "csrc/core/random.hpp",
        "source.variable, slab}",
        "0, slab}",
        "tests/test_low_memory_bits.py::test_another_seed_variable_or_part_draws_other_numbers",
    ),
    Mutant(
        "the scale of a block grows by too little",
        "csrc/core/low_state.hpp",
        "from + ((to - from + 0x7fffffu) >> 23 << 23)",
        "from + ((to - from) >> 23 << 23)",
        "tests/test_low_memory_bits.py::test_bits_of_the_program",
    ),
    Mutant(
        "converted weights lose the sign of their remainders",
        "csrc/core/state_conversion.cpp",
        "bits_at<std::int16_t>(remainders, i)",
        "bits_at<std::uint16_t>(remainders, i)",
        "tests/test_low_memory_bits.py::test_weights_are_split_and_joined_as_by_the_program",
    ),
    Mutant(
        "convert_state forgets that there are remainders",
        "python/adamax_ext/convert.py",
        "format_entries(state_bits, rounding, seed",
        'format_entries(state_bits, "nearest", seed',
        "tests/test_low_memory_saving.py::test_conversion_is_that_of_the_program",
    ),
    # ---- Checks ----------------------------------------------------------------------------------
    Mutant(
        "beta_2 is not checked",
        "csrc/core/scalars.cpp",
        '  require_beta("beta_2", g.beta_2);\n',
        "",
        "tests/test_process_settings.py::test_update_refuses_settings",
    ),
    Mutant(
        "a negative size is taken from C++",
        "csrc/core/program.cpp",
        "if (v.size < 0) refuse(",
        "if (false) refuse(",
        "tests/test_packaging.py::test_consumer_of_the_installed_library",
    ),
    Mutant(
        "memory that overlaps is not looked for",
        "csrc/bindings/calls.cpp",
        "  written.seal();\n",
        "",
        "tests/test_refusals.py::test_update_refuses_overlap",
    ),
    Mutant(
        "DLPack's flag for read-only memory is ignored",
        "csrc/bindings/import_dlpack.cpp",
        "(managed->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0",
        "false",
        "tests/test_refusals.py::test_update_refuses",
    ),
    # ---- Processes and threads -------------------------------------------------------------------
    Mutant(
        "a group takes the bias correction of the one before",
        "csrc/core/program.cpp",
        " || group.step != before->step",
        "",
        "tests/test_groups.py::test_groups_that_share_a_beta_or_a_step_with_the_one_before",
    ),
    Mutant(
        "a variable takes the scalars of the first group",
        "csrc/cpu/run.cpp",
        "kernel(row.memory, program.groups[row.group],",
        "kernel(row.memory, program.groups[0],",
        "tests/test_groups.py::test_groups_are_steps_of_their_own",
    ),
    Mutant(
        "a child uses the threads of its parent",
        "csrc/cpu/parallel.cpp",
        "is_forked_child.store(true)",
        "is_forked_child.store(false)",
        "tests/test_stress.py::test_forked_child_runs_serially",
    ),
    Mutant(
        "threads keep the floating-point mode that they inherit",
        "csrc/cpu/parallel.cpp",
        "    const FloatingPointMode ieee;\n",
        "",
        "tests/test_threads.py::test_threads",
    ),
    Mutant(
        "the GIL is held during a step",
        "csrc/bindings/backend.cpp",
        "  const WithoutGil released;\n  try {\n",
        "  try {\n",
        "tests/test_stress.py::test_other_threads_run_during_a_step",
    ),
    Mutant(
        "lent memory is not given back",
        "csrc/bindings/import_view.cpp",
        "leases.keep(std::move(view));",
        "view.release();",
        "tests/test_buffers.py::test_shared_memory_is_given_back_after_success_and_refusal",
    ),
    Mutant(
        "an optimizer is entered during a step of its own",
        "python/adamax_ext/locking.py",
        "if running is not call:",
        "if False:",
        "tests/test_apply.py::test_a_learning_rate_cannot_enter_its_optimizer",
    ),
    # ---- A GPU, emulated -------------------------------------------------------------------------
    Mutant(
        "positions in 32 bits",
        "csrc/cuda/tables.hpp",
        "static_cast<std::int64_t>(of_row) * chunk_size",
        "static_cast<std::int32_t>(of_row * chunk_size)",
        "tests/test_cuda_emulated.py::test_index_arithmetic",
    ),
    Mutant(
        "a thread goes on behind the end",
        "csrc/cuda/access.hpp",
        "k < count; k += threads) body(access, begin + k)",
        "k <= count; k += threads) body(access, begin + k)",
        "tests/test_cuda_emulated.py::test_update",
    ),
    # ---- The optimizer ---------------------------------------------------------------------------
    Mutant(
        "betas swapped",
        "python/adamax_ext/native.py",
        "group.beta_1, group.beta_2 = settings.beta_1, settings.beta_2",
        "group.beta_2, group.beta_1 = settings.beta_1, settings.beta_2",
        "tests/test_optimizer_bits.py::test_rates_that_change",
    ),
    Mutant(
        "a schedule sees the number of the call to come",
        "python/adamax_ext/optimizer.py",
        "rates.at(progress.learning_rate, calls)",
        "rates.at(progress.learning_rate, calls + 1)",
        "tests/test_optimizer_bits.py::test_rates_that_change",
    ),
    Mutant(
        "averages overwrite weights one update late",
        "python/adamax_ext/native.py",
        "step % every == 0",
        "updates_done % every == 0",
        "tests/test_optimizer_bits.py::test_every_combination_of_settings",
    ),
    Mutant(
        "a loss scale grows one step late",
        "python/adamax_ext/loss_scale.py",
        "good_steps >= self.dynamic_growth_steps",
        "good_steps > self.dynamic_growth_steps",
        "tests/test_loss_scale.py::test_good_steps_have_the_bits_of_adamax",
    ),
    # ---- Files -----------------------------------------------------------------------------------
    Mutant(
        "the file is not synced before it gets its name",
        "python/adamax_ext/checkpoint.py",
        "            os.fsync(descriptor)\n        os.replace",
        "        os.replace",
        "tests/test_saving_faults.py::test_the_data_is_on_disk_before_the_name_and_the_name_before_the_end",
    ),
    Mutant(
        "the folder is not synced",
        "python/adamax_ext/checkpoint.py",
        "    _sync_folder(target.parent)\n",
        "",
        "tests/test_saving_faults.py::test_the_data_is_on_disk_before_the_name_and_the_name_before_the_end",
    ),
    Mutant(
        "entries of another format version are not looked at",
        "python/adamax_ext/checkpoint.py",
        "if set(state_dict) != _KEYS[version]:",
        "if False:",
        "tests/test_saving_refusals.py::test_a_state_that_does_not_fit_is_refused",
    ),
    # ---- torch, Keras, JAX -----------------------------------------------------------------------
    Mutant(
        "torch: the step count advances twice",
        "csrc/bindings/step_variable.cpp",
        "*static_cast<float*>(count) = static_cast<float>(step);",
        "*static_cast<float*>(count) = static_cast<float>(step) + 1.0f;",
        "tests/test_torch_beside_torch.py::test_the_bits_of_update_in_any_size",
    ),
    Mutant(
        "torch: state that a failed step made stays",
        "python/adamax_ext/torch/stepping.py",
        "                    del states[param]\n",
        "                    pass\n",
        "tests/test_torch_all_or_nothing.py::test_a_fault_of_the_last_parameter_changes_nothing",
    ),
    Mutant(
        "Keras: a step is not counted",
        "python/adamax_ext/keras/torch_step.py",
        "self._number.write(iterations, calls + 1)",
        "self._number.write(iterations, calls)",
        "tests/test_keras_steps.py::test_apply_gradients_returns_the_iterations",
    ),
    Mutant(
        "Keras: weights of the wrong variables decay",
        "python/adamax_ext/keras/torch_step.py",
        "int(not optimizer._use_weight_decay(v))",
        "int(optimizer._use_weight_decay(v))",
        "tests/test_keras_steps.py::test_exclusion_from_decay_before_and_after_building",
    ),
    Mutant(
        "JAX: donated arrays are copied",
        "python/adamax_ext/jax/step.py",
        "in_place = {i: i for i in range(len(results))}",
        "in_place: dict[int, int] = {}",
        "tests/test_jax_memory.py::test_donated_arrays_are_overwritten",
    ),
    Mutant(
        "JAX: the count goes on behind the largest number",
        "python/adamax_ext/jax/transformation.py",
        "count + (count < jnp.iinfo(jnp.int32).max)",
        "count + 1",
        "tests/test_jax_bits.py::test_the_count_is_raised_to_the_largest_and_stays",
    ),
]
