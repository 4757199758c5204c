// Sums that do not depend on the order of what is added. Part of bodies.inl.

// The exact sum so far, as doubles that do not overlap, smallest first (J. R. Shewchuk, "Adaptive Precision
// Floating-Point Arithmetic", 1997, as in Python's math.fsum). Doubles span 2098 bits, and each has at least one of
// them to itself.
constexpr int kMostParts = 2100;

struct ExactSum {
    double parts[kMostParts];
    int count;
    double special;  // sum of what is infinite, overflow included, and of NaN; 0 when there is none

    void add(double x) {
        if (!(x - x == 0.0)) {
            special += x;
            return;
        }
        int kept = 0;
        for (int i = 0; i < count; i++) {
            const double y = parts[i], sum = x + y;
            const double of_y = sum - x, of_x = sum - of_y;
            const double rest = (x - of_x) + (y - of_y);  // sum + rest is x + y, exactly, whichever is larger
            if (rest != 0.0) parts[kept++] = rest;
            x = sum;
        }
        if (!(x - x == 0.0)) {
            special += x;
            kept = 0;
        } else if (x != 0.0) {
            parts[kept++] = x;
        }
        count = kept;
    }

    // Rounded once, half to even.
    double rounded() const {
        if (special != 0.0) return special;  // NaN too
        if (count == 0) return 0.0;
        int i = count - 1;
        double sum = parts[i], rest = 0.0;
        while (i > 0 && rest == 0.0) {
            const double x = sum, y = parts[--i];
            sum = x + y;
            rest = y - (sum - x);
        }
        // What is left may be half a unit of `sum`, and the parts below it then say which way to go.
        if (i > 0 && ((rest < 0.0 && parts[i - 1] < 0.0) || (rest > 0.0 && parts[i - 1] > 0.0))) {
            const double twice = rest * 2.0, next = sum + twice;
            if (twice == next - sum) return next;
        }
        return sum;
    }
};

void sum_errors(const double* stats, int64_t rows, double* out) {
    ExactSum squares = {}, weights = {}, products = {};
    double largest = stats[2], at_ends = 0.0, zeroed = 0.0;
    for (int64_t row = 0; row < rows; row++) {
        const double* each = stats + row * kFigures;
        squares.add(each[0]);
        weights.add(each[1]);
        largest = (each[2] > largest) | (each[2] != each[2]) ? each[2] : largest;
        products.add(each[3]);
        at_ends += each[4];
        zeroed += each[5];
    }
    out[0] = squares.rounded();
    out[1] = weights.rounded();
    out[2] = largest;
    out[3] = products.rounded();
    out[4] = at_ends;
    out[5] = zeroed;
}
