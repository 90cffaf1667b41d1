"""Quantiles of Student's t; apart from the statistics that need torch, which a figure does not."""

Z = 1.959964  # two-sided 95 % point of the normal distribution
# Two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom.
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def t_quantile(degrees: int) -> float:
    """Two-sided 95 % point of Student's t; from 11 degrees on an expansion, within 0.003."""
    if degrees <= len(T_95):
        return T_95[degrees - 1]
    first, second = (Z**3 + Z) / 4, (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96
    return Z + first / degrees + second / degrees**2
